"""The RabbitMQ engine: quorum queues on a broker that may be a cluster, shared with programs that know no Filao."""

from filao.engines.rabbitmq.engine import RabbitmqEngine

__all__ = ["RabbitmqEngine"]
