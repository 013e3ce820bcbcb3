"""Operators of memory layers, each with a PyTorch path (reference.py, any device) and Triton kernels (triton.py).

`embedding_bag`  weighted sums of table rows; backward gives compact row gradients, never a table-sized tensor
`product_key`    the exact search of n*n rows by two halves
`row_adamw`      AdamW on the rows that were read, equal to dense AdamW through replay of missed steps
`bench`          all of them beside torch's own: `python -m kernels.bench`

CPU tensors take the PyTorch path and CUDA tensors the Triton kernels; `backend=` or KERNELS_BACKEND overrides
(`dispatch`). Needs torch, and triton for CUDA; numpy, where installed, speeds the search up on CPU. The Triton kernels
are tested under TRITON_INTERPRET=1 (triton 3.6 and 3.9): on a GPU they have neither run nor been measured yet.
"""
