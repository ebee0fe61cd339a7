"""The embedded example: real photographs of the scikit-image wheel, in the formats of a real data set."""
