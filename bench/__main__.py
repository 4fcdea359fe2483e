"""`python -m bench`: the engine against PEFT, the sampler against `generate`, the whole way, HTTP against it."""

from bench import end_to_end, engine, gateway, long_prompt, sampling

if __name__ == "__main__":
    engine.main([])
    sampling.main([])
    long_prompt.main([])
    end_to_end.main([])
    gateway.main([])
