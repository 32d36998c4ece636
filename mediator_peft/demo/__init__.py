"""The demonstration on a real model: fine-tune three experts, merge, route, measure."""
