"""distgpt: train a GPT from scratch on one CPU, one GPU or many machines."""

import os

__version__ = "0.1.0"

ENVIRONMENT = {
    # Read once, when torch is imported: large CPU tensors are allocated in huge pages, so that the first write to fresh
    # memory takes a fifth of the time (25 instead of 4-6 GB/s; GPT-tiny's uncompiled step runs 2.0x as fast).
    "THP_MEM_ALLOC_ENABLE": "1",
    # torch.compile trusts the processor's list of vector instructions instead of compiling a test program for each set
    # (6 s without a cache, else 1.5 s). distgpt tests compilation as a whole before it uses it.
    "TORCHINDUCTOR_VEC_ISA_OK": "1",
    # GNU OpenMP's threads spin at the end of every parallel region. Where other processes want the processors, that
    # costs ten times the work itself: spin briefly, then sleep.
    "GOMP_SPINCOUNT": "1000",
}
"""Environment variables set for torch, unless the user has set them."""

if "OMP_WAIT_POLICY" in os.environ:  # the user has chosen how threads wait
    del ENVIRONMENT["GOMP_SPINCOUNT"]
os.environ.update(ENVIRONMENT | os.environ)
