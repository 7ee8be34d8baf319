"""DeepSpeed itself: the dict that configures it, its operators, what is put right in it."""
