"""What the network computes: tokenizer, head, backbone, the two BitDance models, their weights in and out."""
