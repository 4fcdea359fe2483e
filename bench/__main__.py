"""`python -m bench`: the engine against PEFT, on dense models, on experts and over 4 bits, passes against their own
products, the sampler against `generate`, both at once, the whole way, HTTP, a loop that samples from its newest
weights, recovery, one run over several replicas, what a long run leaves behind, what hostile images cost, and long
rows."""

from bench import (
    end_to_end,
    engine,
    experts,
    gateway,
    images,
    journal,
    long_prompt,
    long_rows,
    loops,
    passes,
    quantised,
    recovery,
    replicas,
    sampling,
    shares,
)
from bench.goals import settle

if __name__ == "__main__":
    benches = (
        engine,
        passes,
        experts,
        quantised,
        sampling,
        long_prompt,
        shares,
        end_to_end,
        gateway,
        loops,
        recovery,
        replicas,
        journal,
        images,
        long_rows,
    )
    settle([missed for bench in benches for missed in bench.main([])])
