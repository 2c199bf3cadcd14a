"""placeholder"""
def method_of(rules): return None
