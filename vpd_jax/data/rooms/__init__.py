"""The procedural rooms: scene, furniture, figure, ray caster, sentences."""
