"""What the network computes: tokenizer, head, backbone, the two BitDance models, their weights in and out.

Sources that docstrings name: "the paper" is BitDance, arXiv 2602.14041; "the published code" is the
repository that came with it, github.com/shallowdream204/BitDance, and a path after it is one of its files.
"""
