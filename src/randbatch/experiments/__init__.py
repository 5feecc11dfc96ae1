"""Commands that measure: theorems, systems of particles, time and memory. Each is a module, imported when it is run."""
