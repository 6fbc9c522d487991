"""Triton kernels of the ops and their launch; nothing else imports triton."""
