"""Tiny real GRPO trainings, the faults that ruin them live, and the rescue they are measured by."""
