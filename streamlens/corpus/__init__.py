"""Text or ids -> windows of tokens that need no padding.

documents   where text comes from       windows   how it is cut
"""
