"""vLLM's own reader of adapters' folders: `python tests/vllm/reader.py FOLDER MODULE...`, with the layers of a model.

Prints what it read, the shapes of A and B by the layer's name, as a line of JSON. It imports nothing of Lorry's.
"""

import json
import os
import sys

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

if __name__ == "__main__":
    folder, *modules = sys.argv[1:]
    helper = PEFTHelper.from_local_dir(folder, max_position_embeddings=64)
    read = LoRAModel.from_local_checkpoint(folder, set(modules), peft_helper=helper, device="cpu", lora_model_id=1)
    print(
        json.dumps({name: [list(layer.lora_a.shape), list(layer.lora_b.shape)] for name, layer in read.loras.items()})
    )
