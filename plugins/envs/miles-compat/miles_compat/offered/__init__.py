"""What functions of upstream import from their frameworks, module by module; `miles_compat.modules` says which is
which.
"""
