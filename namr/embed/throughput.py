"""How fast a run of extraction was, and which of its stages is the slow one: read, decode, model, write.

Not covered: measuring a stage (`decoding` and `extraction` do).
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What embedding took, summed over workers and threads."""

    num_images: int
    """that went through all stages: of the shards that were embedded now"""
    read_s: float
    decode_s: float
    model_s: float
    write_s: float
    waited_s: float
    """that models waited for pixels, with nothing to do"""
    seconds: float
    """of one worker with its shards; of a whole run from its first look to its last, the start of Ray
    included"""

    @property
    def images_per_s(self) -> float:
        """Of the whole run."""
        return self.num_images / self.seconds if self.seconds else 0.0

    @property
    def stages(self) -> str:
        """What one worker does of each stage in a second of it, and how long models waited, in words."""
        spent = {"read": self.read_s, "decode": self.decode_s, "model": self.model_s, "write": self.write_s}
        rates = [f"{name} {self.num_images / took:,.0f}" for name, took in spent.items() if took]
        busy = self.model_s + self.waited_s
        waited = f"; models waited {self.waited_s / busy:.0%} of their time" if busy else ""
        return f"images/s of one alone: {', '.join(rates)}{waited}" if rates else "no image was embedded"


def total(parts: Iterable[Throughput], *, seconds: float) -> Throughput:
    """Of a run that took so long, from those of its workers' shards."""
    all_of_them = list(parts)
    return Throughput(
        num_images=sum(part.num_images for part in all_of_them),
        read_s=sum(part.read_s for part in all_of_them),
        decode_s=sum(part.decode_s for part in all_of_them),
        model_s=sum(part.model_s for part in all_of_them),
        write_s=sum(part.write_s for part in all_of_them),
        waited_s=sum(part.waited_s for part in all_of_them),
        seconds=seconds,
    )
