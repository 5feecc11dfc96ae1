"""What the commands measure: convergence against theorems, systems of particles, layers and trained networks."""
