"""Detectors: encoder, trees, linear baseline, fusion, training, bundle, serving-side scoring.

Light by rule: importing this package, `models.bundle` or `models.detector` loads no torch and no
transformers. Those live in `models.encoder` and `models.training`, which only the training process imports.
Orchestration does not belong here: training takes a file and a spec and leaves a directory.
"""
