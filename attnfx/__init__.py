"""attnfx: a torch.compile backend that lifts hand-written attention and runs it in linear memory."""

__version__ = "0.1.0"
