"""What the machine can do: ceilings measured in this process."""
