"""Operations with a fast path; each stands beside the plain twin that defines it."""
