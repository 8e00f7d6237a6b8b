# SPDX-License-Identifier: Apache-2.0
"""Every error nova-snowflock raises on purpose. Messages are complete sentences for an operator."""


class SnowFlockError(Exception):
    """Base of all of them."""


class InvalidDescriptor(SnowFlockError):
    """A descriptor is of an unknown version, truncated, altered or ill-formed."""


class InvalidPageMap(SnowFlockError):
    """An encoded page map does not decode to the number of pages it must describe."""


class SourceLost(SnowFlockError):
    """The content of a fork image is gone: what held it has ended or was cut short."""


class InvalidStream(SnowFlockError):
    """A migration stream or libvirt save image is not of the form it must have."""


class InvalidDomain(SnowFlockError):
    """A domain's XML cannot be parsed or cannot be turned into a clone's."""


class ControlError(SnowFlockError):
    """A memory server or memtap refused a command or does not answer."""


class CannotFork(SnowFlockError):
    """The guest cannot be forked. The message is the reason; the guest is untouched."""


class FreezeFailed(SnowFlockError):
    """The hypervisor process could not be frozen; it runs on as before, unless it died itself."""


class CaptureFailed(SnowFlockError):
    """A fork failed after the guest was stopped. It runs again and nothing of the image is left."""


class SpawnFailed(SnowFlockError):
    """A clone could not be started. What the attempt had made is undone."""


class MonitorError(SnowFlockError):
    """The hypervisor's monitor refused a command or gave an answer that makes no sense."""


class ForkNotFound(SnowFlockError):
    """There is no such fork image, or it has been released."""


class ForkInUse(SnowFlockError):
    """Clones still need the fork image."""


class HostUnavailable(SnowFlockError):
    """A compute host gives no answer, or cannot do what it is asked."""


class DiskError(SnowFlockError):
    """A disk's files are not what they must be, or merging or copying its layers failed."""
