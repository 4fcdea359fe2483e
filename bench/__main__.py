"""`python -m bench`: the engine against PEFT, the sampler against `generate`, both at once, the whole way, and HTTP."""

from bench import end_to_end, engine, gateway, long_prompt, sampling, shares
from bench.goals import settle

if __name__ == "__main__":
    settle(
        [missed for bench in (engine, sampling, long_prompt, shares, end_to_end, gateway) for missed in bench.main([])]
    )
