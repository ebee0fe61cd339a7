"""Runs the commands of `bitdance` on a Slurm cluster: batch scripts, and what fills in, submits and follows
them."""
