"""`bitdance plan`: what a stage costs before anything is trained. No GPU, no weights, no dataset needed.

gpus.py        what is known of each kind of GPU
model_size.py  the sizes of the model that a recipe trains, wherever they are written
states.py      bytes of weights, gradients and optimizer on a GPU, by ZeRO stage
live_bytes.py  how many bytes a computation holds at its peak, without computing it
activations.py the peak of a forward and backward pass of the real model
batches.py     real packs of the dataset's, or an assumed, mix of samples
work.py        FLOPs, time of a step, traffic
estimate.py    all of it together, and what would make a plan fit
text.py        as a person reads it
"""
