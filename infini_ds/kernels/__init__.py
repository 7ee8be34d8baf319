"""Operations: one folder each, with a plain specification beside the fast paths."""
