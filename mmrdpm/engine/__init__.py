"""The parts of training at scale, each one idea: parallel models, the guard, the meter."""
