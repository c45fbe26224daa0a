"""Graph rewrites and analyses, one a file or, where that is too long, one a folder.

`pipeline` holds their order for training, `serving` for vLLM.
"""
