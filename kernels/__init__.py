"""Operators of memory layers, each in PyTorch (reference.py, any device), C (native.c, CPU) and Triton (triton.py).

`embedding_bag`  weighted sums of table rows; backward gives compact row gradients, never a table-sized tensor
`product_key`    the exact search of n*n rows by two halves
`row_adamw`      AdamW on the rows that were read, equal to dense AdamW through replay of missed steps
`bench`          all of them beside torch's own: `python -m kernels.bench`

On CPU float32 tensors take the C path, compiled when first needed (`native`), on CUDA all take the Triton kernels, and
the rest, or all where there is no C compiler, take the PyTorch path; `backend=` or KERNELS_BACKEND overrides
(`dispatch`). Needs torch, and triton for CUDA; numpy, where installed, speeds the PyTorch search up on CPU. The Triton
kernels are tested under TRITON_INTERPRET=1 (triton 3.6 and 3.9): on a GPU they have neither run nor been measured yet.
"""
