"""Looking into trained networks: activations, masks side by side, gradients, and the way between two sets of weights.

Every analysis is a function that gives rows, and `python -m utils.reporting` writes them as CSV and plot.
"""
