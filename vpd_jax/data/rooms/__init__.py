"""Procedural rooms: scene, furniture, figure, ray caster, sentences."""
