"""What you do with a trained model: generate pictures, compare them with the photos they were learnt from."""
