"""Operators of memory layers, each in PyTorch (reference.py, any device), C (native.c, CPU) and Triton (triton.py).

`embedding_bag`  weighted sums of table rows; backward gives compact row gradients, never a table-sized tensor
`product_key`    the exact search of n*n rows by two halves
`row_adamw`      AdamW on the rows that were read, equal to dense AdamW through replay of missed steps
`rotary`         rotary positions of queries and keys together
`bench`          timings next to PyTorch's own operators, and what the Triton kernels compile to:
                 `python -m kernels.bench`

float32 tensors on a CPU use the C code, which is compiled on first use (`native`). CUDA tensors use the Triton kernels.
Everything else uses PyTorch, as do all CPU tensors if there is no C compiler. `backend=` or KERNELS_BACKEND overrides
this (`dispatch`). The package needs torch, and triton for CUDA; numpy, if installed, makes the PyTorch search faster on
a CPU.

The Triton kernels are tested in Triton's interpreter and compiled for sm_80, sm_90 and sm_100 (triton 3.6 and 3.9).
They have not run on a GPU yet.
"""
