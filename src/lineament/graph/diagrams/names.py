"""x"""
def named(atoms, values, ops): return [f"a{i}" for i in range(len(atoms))]
