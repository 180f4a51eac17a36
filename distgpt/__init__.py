"""distgpt: train a GPT from scratch on one CPU, one GPU or many machines."""

import os

ENVIRONMENT = {
    # torch reads this once, while it is imported: large CPU tensors come in huge pages, so that touching
    # fresh memory costs a fifth (4-6 against 25 GB/s; GPT-tiny's plain step runs 2.0x as fast).
    "THP_MEM_ALLOC_ENABLE": "1",
    # torch.compile takes the processor's vector instructions as they are, instead of first trying each set in code and
    # processes of its own (6 s where nothing is cached, else 1.5 s); `parallel.can_compile` tries the whole anyway.
    "TORCHINDUCTOR_VEC_ISA_OK": "1",
}
"""What torch is set to from outside, unless the user has."""

os.environ.update(ENVIRONMENT | os.environ)
