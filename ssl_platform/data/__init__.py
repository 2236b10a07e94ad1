"""From files to batches: packing, the index of samples, their order, and the pipeline that reads them."""
