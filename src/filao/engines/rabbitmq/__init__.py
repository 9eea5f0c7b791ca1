"""RabbitMQ as an engine: quorum queues on a server or a cluster, shared with programs that do not use Filao."""

from filao.engines.rabbitmq.engine import RabbitmqEngine

__all__ = ["RabbitmqEngine"]
