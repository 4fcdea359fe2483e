"""`python -m bench`: the engine against PEFT, the sampler against `generate`, both at once, the whole way, and HTTP."""

from bench import end_to_end, engine, gateway, long_prompt, sampling, shares

if __name__ == "__main__":
    engine.main([])
    sampling.main([])
    long_prompt.main([])
    shares.main([])
    end_to_end.main([])
    gateway.main([])
