"""What tests share: servers, load, a model of the queue, a proxy and a learner."""
