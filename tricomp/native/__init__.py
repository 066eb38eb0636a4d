"""The CPU backend: C++17 behind the plain C limited API, SIMD chosen at run time, threads over chunks, no GIL.

This version has none: every leaf is coded by `tricomp.reference`, whose bytes this backend will have to equal.
"""
