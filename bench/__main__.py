"""`python -m bench`: the engine against PEFT and the frozen base, then the whole way against the engine."""

from bench import end_to_end, engine

if __name__ == "__main__":
    engine.main([])
    end_to_end.main([])
