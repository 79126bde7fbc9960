"""Solutions with a certificate: `minimize`, paths of strengths, cross-validation.

`certificates` says how far from a solution a point is, `proximal_newton` descends with minima of models (`quadratic`),
`implicit` differentiates the solution, `strengths` places a path.
"""
