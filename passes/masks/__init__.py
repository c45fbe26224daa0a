"""What a mask is: proven from its values for every length, or not said.

`prover.Prover` is asked; `values` computes the mask, `scope`, `reach`, `counted` and `keys` say at
which lengths that is enough, `bands` and `slopes` name what was seen.
"""
