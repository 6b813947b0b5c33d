"""The bundled demo model: a small DeepSeek-V3-style MoE trained on the Python standard library.

The folder holds everything a pod needs to serve it (`README.md` is the model card); `train/` made it.
"""
