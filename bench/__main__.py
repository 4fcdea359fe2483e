"""`python -m bench`: the engine against PEFT, on dense models, on experts and over 4 bits, the sampler against
`generate`, both at once, the whole way, HTTP, a loop that samples from its newest weights, recovery, and what a long
run leaves behind."""

from bench import (
    end_to_end,
    engine,
    experts,
    gateway,
    journal,
    long_prompt,
    loops,
    quantised,
    recovery,
    sampling,
    shares,
)
from bench.goals import settle

if __name__ == "__main__":
    benches = (engine, experts, quantised, sampling, long_prompt, shares, end_to_end, gateway, loops, recovery, journal)
    settle([missed for bench in benches for missed in bench.main([])])
