import torch
from hypothesis import settings

# Tiny models gain nothing from a second thread, and threads that spin beside another busy process cost tenfold.
torch.set_num_threads(1)

# A busy machine is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
