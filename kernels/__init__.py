"""Operations on tensors: each with a float64-tested reference and the fast paths behind one signature."""
