"""The operations of a decoder, one file each.

Every file has a plain torch reference and one public function that chooses how to run: that function is the place where
a Triton kernel for CUDA tensors is called from. All tensors are on one device, contiguous in their last dimension.
"""
