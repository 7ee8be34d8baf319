"""Operations, each in a folder with its plain specification and its fast implementations."""
