"""`python -m bench`: the engine against PEFT and the frozen base, the whole way against the engine, HTTP against it."""

from bench import end_to_end, engine, gateway

if __name__ == "__main__":
    engine.main([])
    end_to_end.main([])
    gateway.main([])
