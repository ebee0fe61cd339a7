"""Tensors in files, whatever the model: do they fit it to the last name, and safetensors in and out.

strict.py             do tensors fit a model, and which config value decides it
json_files.py         JSON objects in files
safetensors_files.py  safetensors files, one at a time, in and out
progress.py           how a pass over tensors shows how far it is
"""
