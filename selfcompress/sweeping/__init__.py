"""The sweep behind sweep.py: runs of train.py side by side, their figures and their report."""
