import torch

# Tiny models gain nothing from a second thread, and threads that spin beside another busy process cost tenfold.
torch.set_num_threads(1)
